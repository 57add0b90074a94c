"""Pure functions of (params, arrays): two towers and what joins them. No I/O, no config objects."""
