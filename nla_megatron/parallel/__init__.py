"""Process groups, the CPU stand-ins, small collectives, and failing together."""
