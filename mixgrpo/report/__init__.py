"""The report of one or several runs as one HTML file: curves, images, configuration."""
