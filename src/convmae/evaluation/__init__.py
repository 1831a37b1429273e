"""What features are worth: accuracy, nearest neighbours, linear probes; knows no data set and no command."""
