"""The helper inside the guest, and how it becomes the one file that is delivered on the seed."""
