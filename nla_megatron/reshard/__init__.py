"""From the trainer's shards to the sampler's: regions and plans (pure), both sides' layouts, execution."""
