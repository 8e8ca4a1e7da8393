"""What is to be done, and why: decisions as functions of what is wanted, seen and remembered. PURE."""
