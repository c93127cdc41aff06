"""What a grid's results are shown as: tables, verdict, figures, a page."""
