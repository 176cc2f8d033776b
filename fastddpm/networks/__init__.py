"""The networks that fastddpm executes itself."""
