"""From a path, a hub id or a built-in toy dataset to the columns TRL's trainers expect."""
