"""What finished demos showed, and how it comes into the pages."""
