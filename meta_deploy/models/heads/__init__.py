"""Feature maps to outputs. One file a head, and its parts."""
