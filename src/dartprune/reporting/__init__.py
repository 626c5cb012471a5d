"""What every report is written with: tables, pictures, pages, journals."""
