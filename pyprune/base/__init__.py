"""What everything stands on: errors, files, memory, the machine, time, and the FFN in plain torch."""
