//! The gRPC contract of imprint, compiled from `imprint/v1/*.proto`.
//!
//! The comments in those files are the API reference; what is here is generated from them.
//! Start at [`v1`].

/// Package `imprint.v1`: messages, clients and servers.
pub mod v1 {
    #![expect(
        clippy::allow_attributes_without_reason,
        reason = "generated: tonic gives none"
    )]
    tonic::include_proto!("imprint.v1");
}

/// The encoded `FileDescriptorSet` of the contract, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/imprint.bin"));
