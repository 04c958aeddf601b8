"""What a program holds: stores and banks, blocking and async, over three backends."""
