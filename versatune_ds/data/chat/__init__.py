"""What a conversation is, and how one is read from the values of a row."""
