"""From Program to Program, one file a pass."""
