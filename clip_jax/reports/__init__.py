"""What users look at: the report of a run (``page``), notebook cells (``notebook``) and the terminal (``terminal``)."""
