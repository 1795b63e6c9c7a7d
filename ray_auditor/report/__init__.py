"""What people read: one HTML page and the terminal's tables. Reads a sweep's summary, computes no finding."""
