"""Configuration: the knobs (`schema`) and the command line that sets them (`cli`)."""
