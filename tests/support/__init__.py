"""What several test files share: imported as ``support`` (pytest puts ``tests/`` on the path)."""
