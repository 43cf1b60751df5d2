"""What training takes on machines that need not be at hand: memory, time, and which strategy to choose."""
