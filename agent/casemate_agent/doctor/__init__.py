"""What is missing on a host, and the remedy: ``facts`` are collected by a driver, ``verdicts`` are derived from them."""
