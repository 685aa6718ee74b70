"""Files that are whole or not there, and how weights and folders are recognised."""
