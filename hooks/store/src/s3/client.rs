//! The SDK's client for one store: its endpoint, its certificates, its credentials, and nothing that
//! retries or checks behind its caller's back.

use std::{fmt::Display, fs, path::Path, time::Duration};

use aws_config::{
    ecs::EcsCredentialsProvider,
    environment::{EnvironmentVariableCredentialsProvider, EnvironmentVariableRegionProvider},
    imds::credentials::ImdsCredentialsProvider,
    meta::{credentials::CredentialsProviderChain, region::RegionProviderChain},
    profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider},
    provider_config::ProviderConfig,
    web_identity_token::WebIdentityTokenCredentialsProvider,
};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::{
    Client, Config,
    config::{
        BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
        SharedHttpClient, StalledStreamProtectionConfig, retry::RetryConfig,
        timeout::TimeoutConfig,
    },
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use rekindle_core::config::S3Access;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::S3Error;

/// A connection that takes longer does not come: retransmits of SYN alone are 1 s and 3 s.
const CONNECT: Duration = Duration::from_secs(5);

/// A client that keeps at most so many connections open between requests.
///
/// # Errors
/// [`S3Error::Access`].
pub async fn client(access: &S3Access, connections: usize) -> Result<Client, S3Error> {
    let http = http_client(access, connections)?;
    let region = region(access).await;
    let path_style = access.path_style.unwrap_or(access.endpoint.is_some());
    let mut config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(http.clone())
        .region(region.clone())
        .force_path_style(path_style)
        .retry_config(RetryConfig::disabled())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT).build())
        // Upload trailers and checks of whole objects break some stores and do nothing for ranges.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(endpoint) = &access.endpoint {
        config = config.endpoint_url(endpoint);
    }
    if access.anonymous {
        config = config.allow_no_auth();
    } else {
        config = config.credentials_provider(credentials(access, http, region)?);
    }
    Ok(Client::from_conf(config.build()))
}

/// The store's region, else what the environment or the profile says. Never the metadata service: off
/// AWS it only stalls.
async fn region(access: &S3Access) -> Region {
    if let Some(region) = &access.region {
        return Region::new(region.clone());
    }
    let mut profile = ProfileFileRegionProvider::builder();
    if let Some(name) = &access.profile {
        profile = profile.profile_name(name);
    }
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(profile.build())
        .region()
        .await
        .unwrap_or_else(|| Region::from_static("us-east-1"))
}

/// The SDK's own chain in its own order, with the metadata service only where the configuration asks for it,
/// or a credentials file alone.
fn credentials(
    access: &S3Access,
    http: SharedHttpClient,
    region: Region,
) -> Result<CredentialsProviderChain, S3Error> {
    let common = ProviderConfig::without_region()
        .with_http_client(http)
        .with_region(Some(region));
    let mut profile = ProfileFileCredentialsProvider::builder().configure(&common);
    if let Some(name) = &access.profile {
        profile = profile.profile_name(name);
    }
    if let Some(path) = &access.credentials_file {
        // The SDK takes a missing file for an empty one and then says only "no credentials".
        fs::File::open(path).map_err(|e| unusable(path, e))?;
        let files = EnvConfigFiles::builder()
            .with_file(EnvConfigFileKind::Credentials, path)
            .build();
        let provider = profile.profile_files(files).build();
        return Ok(CredentialsProviderChain::first_try(
            "CredentialsFile",
            provider,
        ));
    }
    let chain = CredentialsProviderChain::first_try(
        "Environment",
        EnvironmentVariableCredentialsProvider::new(),
    )
    .or_else("Profile", profile.build())
    .or_else(
        "WebIdentityToken",
        WebIdentityTokenCredentialsProvider::builder()
            .configure(&common)
            .build(),
    )
    .or_else(
        "EcsContainer",
        EcsCredentialsProvider::builder().configure(&common).build(),
    );
    Ok(if access.instance_metadata {
        let imds = ImdsCredentialsProvider::builder().configure(&common);
        chain.or_else("Ec2InstanceMetadata", imds.build())
    } else {
        chain
    })
}

fn http_client(access: &S3Access, connections: usize) -> Result<SharedHttpClient, S3Error> {
    // The client asserts that the system has certificates; on a bare node with a CA file it has none.
    let native = !rustls_native_certs::load_native_certs().certs.is_empty();
    let mut trust = TrustStore::empty().with_native_roots(native);
    if let Some(path) = &access.ca_file {
        let (pem, _) = authorities(path).map_err(S3Error::Access)?;
        trust.add_pem_certificate(pem);
    }
    let tls = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|e| S3Error::Access(e.to_string()))?;
    Ok(Builder::new()
        .pool_max_idle_per_host(connections)
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(tls)
        .build_https())
}

/// A CA file, checked: the client panics over one that it cannot read.
pub(crate) fn authorities(path: &Path) -> Result<(Vec<u8>, RootCertStore), String> {
    let refuse = |reason: &dyn Display| format!("{}: {reason}", path.display());
    let pem = fs::read(path).map_err(|e| refuse(&e))?;
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(&pem) {
        let cert = cert.map_err(|e| refuse(&e))?;
        roots.add(cert).map_err(|e| refuse(&e))?;
    }
    if roots.is_empty() {
        return Err(refuse(&"there is no certificate in it"));
    }
    Ok((pem, roots))
}

fn unusable(path: &Path, reason: impl ToString) -> S3Error {
    S3Error::Access(format!("{}: {}", path.display(), reason.to_string()))
}
