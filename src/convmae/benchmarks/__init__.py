"""What the speed of the package is measured with and against."""
