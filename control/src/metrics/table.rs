//! Every metric: its name, kind, labels and meaning. A name never changes its meaning.

use prometheus::proto::MetricType;

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Name.
    pub name: &'static str,
    /// Kind.
    pub kind: MetricType,
    /// Labels, in order.
    pub labels: &'static [&'static str],
    /// Meaning.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $id: Metric = Metric { name: $name, kind: MetricType::$kind, labels: &[$($label),*], help: $help };)*
        /// All of them.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    BUILD: GAUGE "esplanade_build_info" ["version"] "Always 1; the version is in the label.";
    START_TIME: GAUGE "esplanade_start_time_seconds" [] "When the gateway started, seconds since 1970.";
    HEALTHY: GAUGE "esplanade_healthy" [] "1 while every worker makes progress.";
    FRAMES: GAUGE "esplanade_frames" [] "Packet buffers.";
    FRAMES_FREE: GAUGE "esplanade_frames_free" [] "Packet buffers in the shared stock; those that workers keep at hand are not counted.";

    RECEIVED: COUNTER "esplanade_worker_received_frames_total" ["worker"] "Frames taken from ports.";
    SENT: COUNTER "esplanade_worker_sent_frames_total" ["worker"] "Frames accepted by ports.";
    HANDED_IN: COUNTER "esplanade_worker_handed_in_frames_total" ["worker"] "Frames that other workers handed to this one because it owns their SA.";
    HANDED_OUT: COUNTER "esplanade_worker_handed_out_frames_total" ["worker"] "Frames handed to the worker that owns their SA.";
    PUNTED: COUNTER "esplanade_worker_punted_frames_total" ["worker", "class"] "Frames given to the kernel by the exception path: ike, routing, neighbour, icmp, other.";
    UNPUNTED: COUNTER "esplanade_worker_unpunted_frames_total" ["worker", "class"] "Frames meant for the kernel that were dropped (punt_limit, punt_full).";
    ENCRYPTED: COUNTER "esplanade_worker_encrypted_packets_total" ["worker"] "Packets encrypted and sent on.";
    DECRYPTED: COUNTER "esplanade_worker_decrypted_packets_total" ["worker"] "Packets decrypted and accepted.";
    BYPASSED: COUNTER "esplanade_worker_bypassed_packets_total" ["worker"] "Clear packets forwarded by a bypass policy.";
    GENERATED: COUNTER "esplanade_worker_generated_frames_total" ["worker", "kind"] "Frames that the gateway made itself.";
    CONSUMED: COUNTER "esplanade_worker_consumed_frames_total" ["worker", "kind"] "Frames that ended inside the gateway for a good reason.";
    DROPPED: COUNTER "esplanade_dropped_frames_total" ["worker", "reason"] "Frames dropped; deploy/drop-reasons.md explains each reason.";
    WAITING: GAUGE "esplanade_worker_waiting_frames" ["worker"] "Frames held now: transmit backlog, reassembly, waiting for a neighbour or for the kernel.";
    IN_FLIGHT: GAUGE "esplanade_worker_in_flight_frames" ["worker"] "Frames inside engines now.";
    POLLS: COUNTER "esplanade_worker_polls_total" ["worker", "result"] "Poll rounds that found work (busy) or none (idle).";
    SHARED_GIVEN: COUNTER "esplanade_worker_shared_packets_total" ["worker", "by"] "Packets of shared SAs that the worker gave to helpers (helper) or ciphered itself (owner).";
    SHARED_RETURNED: COUNTER "esplanade_worker_shared_returned_packets_total" ["worker"] "Packets that came back from helpers.";
    SHARED_WAITING: GAUGE "esplanade_worker_shared_waiting_packets" ["worker"] "Packets of shared SAs that wait to be ciphered, or for those before them, now.";
    SHARED_HELD_UP: COUNTER "esplanade_worker_shared_held_up_total" ["worker"] "Times that ciphered packets were found to wait for earlier ones that a helper still had.";
    SHARED_REFUSED: COUNTER "esplanade_worker_shared_refused_packets_total" ["worker"] "Times that a packet of a shared SA found no room and was offered again.";
    ASSISTED: COUNTER "esplanade_worker_assisted_packets_total" ["worker"] "Packets of other workers' SAs that the worker ciphered (crypto.parallel).";
    SLEEPS: COUNTER "esplanade_worker_sleeps_total" ["worker"] "Times that the worker went to sleep.";
    BURST: HISTOGRAM "esplanade_worker_burst_seconds" ["worker"] "Time from receiving a burst to having it sent.";
    FLOWS: COUNTER "esplanade_worker_flow_cache_lookups_total" ["worker", "result"] "Flow cache look-ups that were answered (hit) or needed the policies (miss).";

    PORT_INFO: GAUGE "esplanade_port_info" ["port", "kind", "side", "mode", "mac"] "Always 1; what the port is.";
    PORT_MTU: GAUGE "esplanade_port_mtu_bytes" ["port"] "Largest IP packet.";
    PORT_RX: COUNTER "esplanade_port_receive_frames_total" ["port", "queue"] "Frames received.";
    PORT_RX_BYTES: COUNTER "esplanade_port_receive_bytes_total" ["port", "queue"] "Bytes received, Ethernet header included.";
    PORT_RX_DROPPED: COUNTER "esplanade_port_receive_dropped_total" ["port", "queue"] "Frames lost before the gateway saw them: no buffer, ring full.";
    PORT_RX_ERRORS: COUNTER "esplanade_port_receive_errors_total" ["port", "queue"] "Frames that arrived broken or too long.";
    PORT_TX: COUNTER "esplanade_port_transmit_frames_total" ["port", "queue"] "Frames sent.";
    PORT_TX_BYTES: COUNTER "esplanade_port_transmit_bytes_total" ["port", "queue"] "Bytes sent, Ethernet header included.";
    PORT_TX_ERRORS: COUNTER "esplanade_port_transmit_errors_total" ["port", "queue"] "Frames accepted for sending that could not be sent.";
    PORT_LINK: GAUGE "esplanade_port_link_up" ["port"] "1 while frames can pass; only ports with a device or a vhost-user peer.";
    PORT_SPEED: GAUGE "esplanade_port_link_bits_per_second" ["port"] "Speed of the link; absent when the device does not say.";
    PORT_DEVICE: COUNTER "esplanade_port_device_events_total" ["port", "event"] "The device's own counters and its driver's: restarts, frames without a buffer, errors on the wire.";
    PORT_FAULTS: COUNTER "esplanade_port_device_faults_total" ["port", "rule"] "How often the device or peer broke a rule; after most the driver starts it anew.";

    ENGINE_STATE: GAUGE "esplanade_engine_state" ["engine", "kind", "state"] "1 for the state that the look-aside engine is in: serving, quarantined, recovering or dead.";
    ENGINE_REASON: GAUGE "esplanade_engine_quarantine_reason" ["engine", "reason"] "1 for the reason of the last quarantine; absent when there was none.";
    ENGINE_SUBMITTED: COUNTER "esplanade_engine_submitted_packets_total" ["engine"] "Packets given to the engine, canaries too.";
    ENGINE_COMPLETED: COUNTER "esplanade_engine_completed_packets_total" ["engine"] "Packets that came back from it.";
    ENGINE_BYTES: COUNTER "esplanade_engine_submitted_bytes_total" ["engine"] "Bytes given to the engine.";
    ENGINE_DOORBELLS: COUNTER "esplanade_engine_doorbells_total" ["engine"] "Doorbells rung: packets by this is the batch.";
    ENGINE_BUSY: COUNTER "esplanade_engine_busy_packets_total" ["engine"] "Times that a packet found no room in the engine.";
    ENGINE_CANARIES: COUNTER "esplanade_engine_canaries_total" ["engine"] "Packets of known content sent through the engine.";
    ENGINE_CANARIES_FAILED: COUNTER "esplanade_engine_canaries_failed_total" ["engine"] "Canaries that came back wrong or not at all.";
    ENGINE_SAMPLES: COUNTER "esplanade_engine_samples_total" ["engine"] "Packets of the traffic that software ciphered again.";
    ENGINE_SAMPLES_FAILED: COUNTER "esplanade_engine_samples_failed_total" ["engine"] "Samples of which software made something else.";
    ENGINE_LOST: COUNTER "esplanade_engine_lost_packets_total" ["engine"] "Packets that failed in the engine or did not come back in time.";
    ENGINE_WRONG: COUNTER "esplanade_engine_wrong_results_total" ["engine"] "Results that cannot be right; each takes the engine out of service.";
    ENGINE_QUARANTINES: COUNTER "esplanade_engine_quarantines_total" ["engine"] "Times that the engine was taken out of service.";
    ENGINE_RESETS: COUNTER "esplanade_engine_resets_total" ["engine", "result"] "Attempts to bring the engine back, by result; one under way counts as ok.";
    ENGINE_FALLBACK: COUNTER "esplanade_engine_fallback_packets_total" ["engine"] "Packets that the CPU ciphered while the engine was out of service.";
    ENGINE_REFUSED: COUNTER "esplanade_engine_refused_packets_total" ["engine"] "Packets that could not be carried because it was: the engine has their numbers.";

    TUNNEL_UP: GAUGE "esplanade_tunnel_up" ["tunnel"] "1 while the tunnel has an outbound SA.";
    TUNNEL_PACKETS: COUNTER "esplanade_tunnel_packets_total" ["tunnel", "direction"] "Packets carried, over all rekeys.";
    TUNNEL_BYTES: COUNTER "esplanade_tunnel_bytes_total" ["tunnel", "direction"] "Bytes of inner packets carried, over all rekeys.";
    TUNNEL_ERRORS: COUNTER "esplanade_tunnel_errors_total" ["tunnel", "direction", "kind"] "Packets refused, over all rekeys.";
    TUNNEL_LOST: COUNTER "esplanade_tunnel_lost_packets_total" ["tunnel"] "Sequence numbers that never arrived, over all rekeys.";
    TUNNEL_REKEYS: COUNTER "esplanade_tunnel_rekeys_total" ["tunnel"] "Outbound SAs that replaced another.";

    IKE_SAS: GAUGE "esplanade_ike_sas" [] "SAs of an IKE daemon that were taken from the kernel.";
    IKE_POLICIES: GAUGE "esplanade_ike_policies" [] "Policies taken from the kernel.";
    IKE_LEFT: GAUGE "esplanade_ike_left" [] "SAs and policies that stay with the kernel; `esplanade ike` says why.";
    IKE_RESYNCS: COUNTER "esplanade_ike_resyncs_total" [] "Times that the kernel's SAs and policies were read anew.";
    IKE_KERNEL_SENT: COUNTER "esplanade_ike_kernel_sent_total" [] "SAs with which the kernel has sent although they were the gateway's; must be 0.";
    IKE_REKEYS_ASKED: COUNTER "esplanade_ike_rekeys_asked_total" [] "Rekeys asked of the daemon: soft limits met, and SAs that could not be taken.";
    IKE_ACQUIRES: COUNTER "esplanade_ike_acquires_total" [] "Packets without an SA that the daemon was told of.";
    IKE_VICI: GAUGE "esplanade_ike_vici_up" [] "1 while the IKE daemon tells the names of its tunnels; absent when it is not asked (ike.vici).";
    IKE_VICI_FAILURES: COUNTER "esplanade_ike_vici_failures_total" [] "Times that the IKE daemon could not be asked for names, or stopped answering.";
    IKE_UNNAMED: GAUGE "esplanade_ike_sas_unnamed" [] "SAs taken from the kernel of which the IKE daemon says nothing.";
    TUNNEL_IKE: GAUGE "esplanade_tunnel_ike_info" ["tunnel", "ike", "child"] "Always 1; the tunnel's names in the IKE daemon's configuration: connection and child SA. One sample a tunnel.";
    TUNNEL_LAST_REKEY: GAUGE "esplanade_tunnel_last_rekey_timestamp_seconds" ["tunnel"] "When an outbound SA last replaced another, seconds since 1970; 0 when none did.";
    TUNNEL_OVERDUE: GAUGE "esplanade_tunnel_rekey_overdue" ["tunnel"] "1 while no successor has come although the hard limit is near.";
    TUNNEL_REKEY_STATE: GAUGE "esplanade_tunnels_by_rekey_state" ["state"] "Tunnels of SA files by the state of their rekey.";
    REKEY_ATTEMPTS: COUNTER "esplanade_rekey_hook_runs_total" ["result"] "Runs of the rekey hook: done, failed, killed at its time limit, not_started.";

    SAS: GAUGE "esplanade_sas" ["direction"] "SAs installed.";
    SAS_RETIRING: GAUGE "esplanade_sas_retiring" [] "SAs removed that some worker may still use.";
    SAS_SUITE: GAUGE "esplanade_sas_by_suite" ["suite", "provider"] "SAs by suite and crypto provider.";
    SAS_UNLISTED: GAUGE "esplanade_sas_unlisted" [] "SAs without metrics of their own, because there are more than metrics.max_sas.";
    SA_PACKETS: COUNTER "esplanade_sa_packets_total" ["sa", "tunnel", "direction", "spi"] "Packets carried.";
    SA_BYTES: COUNTER "esplanade_sa_bytes_total" ["sa", "tunnel", "direction", "spi"] "Bytes of inner packets carried.";
    SA_ERRORS: COUNTER "esplanade_sa_errors_total" ["sa", "tunnel", "direction", "spi", "kind"] "Packets refused.";
    SA_SEQUENCE: GAUGE "esplanade_sa_sequence_number" ["sa", "tunnel", "direction", "spi"] "Outbound: next number. Inbound: highest number authenticated.";
    SA_LEASE: GAUGE "esplanade_sa_lease_remaining" ["sa", "tunnel", "direction", "spi"] "Sequence numbers that are on disk and not used yet.";
    SA_AGE: GAUGE "esplanade_sa_age_seconds" ["sa", "tunnel", "direction", "spi"] "Time since the SA was installed.";
    SA_EVENTS: COUNTER "esplanade_sa_events_total" ["event"] "Events of SAs: limits, sequence space, leases, forged packets.";
    EVENTS: COUNTER "esplanade_events_total" ["event"] "Entries of the event stream by kind; only kinds that occurred.";
    STATES: GAUGE "esplanade_states" ["event"] "States of the event stream that hold now, by kind; only kinds that occurred.";

    POLICIES: GAUGE "esplanade_policies" ["direction"] "Policies, the default discard not counted.";
    POLICY_HITS: COUNTER "esplanade_policy_hits_total" ["policy", "direction", "action"] "Packets that the policy decided about; up to a second late under load.";

    LEASES: GAUGE "esplanade_leases" [] "Sequence leases in use.";
    LEASES_FAILED: GAUGE "esplanade_leases_failed" [] "Leases that cannot be extended because the lease store failed.";
    EPOCH: GAUGE "esplanade_snapshot_epoch" [] "Number of the published snapshot.";

    KERNEL_SYNCED: GAUGE "esplanade_kernel_synced" [] "1 once the kernel's tables were read; absent when nothing is mirrored.";
    KERNEL_ROUTES: GAUGE "esplanade_kernel_routes" [] "Routes of the kernel, those of tables that are not used here included.";
    KERNEL_REFUSED: GAUGE "esplanade_kernel_routes_refused" [] "Prefixes whose route cannot be carried out here: their packets are dropped.";
    KERNEL_NEIGHBOURS: GAUGE "esplanade_kernel_neighbours" [] "Neighbours on ports that the kernel can reach.";
    KERNEL_SYNC_TIME: GAUGE "esplanade_kernel_last_sync_timestamp_seconds" [] "When the kernel's tables were last read, seconds since 1970.";
    KERNEL_SYNC_TOOK: GAUGE "esplanade_kernel_last_sync_duration_seconds" [] "How long that took.";
    KERNEL_RESYNCS: COUNTER "esplanade_kernel_resyncs_total" [] "Times that the kernel's tables had to be read again because changes were missed.";
    KERNEL_OVERRUNS: COUNTER "esplanade_kernel_overruns_total" [] "Times that the kernel's messages came faster than they were read.";
    KERNEL_STRANGE: COUNTER "esplanade_kernel_messages_not_understood_total" [] "Messages of the kernel that were not understood.";
    KERNEL_PUBLISHED: COUNTER "esplanade_kernel_publications_total" [] "Tables published because the kernel's had changed.";
    KERNEL_PUBLISH_TOOK: GAUGE "esplanade_kernel_last_publication_duration_seconds" [] "How long the last of them took to build.";
    KERNEL_REQUESTS: COUNTER "esplanade_kernel_neighbour_requests_total" ["result"] "Neighbours that the kernel was asked for.";
    ROUTES: GAUGE "esplanade_routes" [] "Paths in the table that workers look up.";

    RELOAD_OK: GAUGE "esplanade_config_last_reload_successful" [] "1 when the SA files, as last read, are what runs.";
    RELOAD_TIME: GAUGE "esplanade_config_last_reload_timestamp_seconds" [] "When the SA files were last read, seconds since 1970.";
    RELOAD_TOOK: GAUGE "esplanade_config_last_reload_duration_seconds" [] "How long that took.";
    RELOADS: COUNTER "esplanade_config_reloads_total" ["result"] "Reloads of the SA files.";

    CRYPTO: GAUGE "esplanade_crypto_provider_info" ["suite", "provider"] "Always 1; which provider serves the suite.";
    CRYPTO_COST: GAUGE "esplanade_crypto_packet_seconds" ["suite", "provider"] "Mean of the times to seal and to open a packet of 1420 bytes, measured at start.";
}
