"""What the tests share: servers, sites, services and databases to run against."""
