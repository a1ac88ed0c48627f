"""Where the runtime computes: device, side streams, threads."""
