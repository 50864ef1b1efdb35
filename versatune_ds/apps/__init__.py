"""Floor 7: programs over the engine; the engine never imports them."""
