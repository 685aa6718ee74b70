"""What surrounds a run: validation, saving and stopping, records, pictures, the watchdog."""
