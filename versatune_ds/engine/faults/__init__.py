"""What keeps a run from hanging, or from dying without a word."""
