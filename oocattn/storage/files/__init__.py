"""Files and folders: bounded reads, durable writes, removal of our own."""
