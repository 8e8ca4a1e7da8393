"""What an agent measures: the families of its metrics, and their values when somebody scrapes."""
