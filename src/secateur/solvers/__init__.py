"""What methods share. No method imports another one."""
