"""What happened in one run or several, as one HTML file: curves, pictures, configuration."""
