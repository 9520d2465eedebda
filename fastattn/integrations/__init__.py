"""Other people's models and the methods of this package."""
