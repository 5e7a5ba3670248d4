"""The engines: two implementations of the Engine protocol, chosen by name and imported lazily."""
