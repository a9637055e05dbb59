"""What smoothk is compared with: other people's ways to compress a trained network without a gradient step."""
