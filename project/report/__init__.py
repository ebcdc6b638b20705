"""Result files in, text, tables and pictures out."""
