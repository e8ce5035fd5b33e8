"""Starting things: processes on this machine, and the demo."""
