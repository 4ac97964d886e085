"""Pictures of what attention looked at, drawn with matplotlib."""
