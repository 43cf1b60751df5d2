"""How a sparse weight lies in a device's memory: a layout a file, each with the op that multiplies by it."""
