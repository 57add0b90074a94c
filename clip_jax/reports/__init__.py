"""What people look at: the page of a run (``page``), its figures (``plots``) and the terminal (``terminal``)."""
