"""What each training worker (rank) runs."""
