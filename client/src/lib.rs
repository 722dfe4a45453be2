//! imprint-client
