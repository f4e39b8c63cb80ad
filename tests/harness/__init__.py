"""What the tests need beside pytest."""
