"""Speed and memory, against dense decoding measured in the same run and against the device's memory bandwidth."""
