"""Floor 9: programs over the engine, each a room or a file of its own; the engine never imports them."""
