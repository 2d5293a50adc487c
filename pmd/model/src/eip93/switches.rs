//! What the reference does not know, or infers: one switch each, so that one run on silicon can settle it.

/// How the model reads what is not known.
#[derive(Debug, Clone, clap::Args)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a fact to be settled on its own"
)]
pub struct Switches {
    /// REVISION register
    #[arg(long, default_value_t = 0x0341_a25d)]
    pub revision: u32,
    /// OPTION_1 register (as read from AN7583; the model itself has no DES, MD5 and ARC4 and refuses them)
    #[arg(long, default_value_t = 0xf08f_e007)]
    pub options: u32,
    /// ESP outbound takes IVs from the state record (IV_SOURCE 2)
    #[arg(long)]
    pub esp_iv_from_state: bool,
    /// ESP outbound gives counter mode random IVs (IV_SOURCE 3)
    #[arg(long)]
    pub counter_mode_with_random_iv: bool,
    /// The length of a basic encrypt-then-hash result leaves out the ICV
    #[arg(long)]
    pub basic_length_without_icv: bool,
    /// Words 1 to 4 of a result are zero instead of the command's
    #[arg(long)]
    pub result_without_addresses: bool,
    /// Sources and destinations may begin at any byte
    #[arg(long)]
    pub any_alignment: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Switches {
            revision: 0x0341_a25d,
            options: 0xf08f_e007,
            esp_iv_from_state: false,
            counter_mode_with_random_iv: false,
            basic_length_without_icv: false,
            result_without_addresses: false,
            any_alignment: false,
        }
    }
}
