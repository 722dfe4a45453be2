//! The kernels by name: their machine code, and what they take.
//!
//! The texts are kernels/*.cu. Start at [`Kernel`].

macro_rules! kernels {
    ($($file:literal { $($kernel:ident $name:literal $kinds:literal,)* })*) => {
        /// A kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kernel {
            $($(#[doc = concat!("`", $name, "` of kernels/", $file, ".cu.")] $kernel,)*)*
        }

        impl Kernel {
            /// All of them, in the order of the declaration.
            pub const ALL: &[Self] = &[$($(Self::$kernel,)*)*];

            /// Its name in the machine code.
            pub fn name(self) -> &'static str {
                match self { $($(Self::$kernel => $name,)*)* }
            }

            /// What it takes, one letter an argument: `p`ointer, `u`32 (or i32), `l` u64, `f`32, `d` f64.
            pub fn kinds(self) -> &'static str {
                match self { $($(Self::$kernel => $kinds,)*)* }
            }

            /// Index of the file that holds it.
            pub(crate) fn file(self) -> usize {
                let file = match self { $($(Self::$kernel => $file,)*)* };
                IMAGES.iter().position(|(name, _)| *name == file).unwrap_or(0)
            }
        }

        /// Each file's machine code for sm_90a.
        #[cfg(feature = "cuda")]
        pub(crate) const IMAGES: &[(&str, &[u8])] =
            &[$(($file, include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".cubin"))),)*];
        /// Without the feature there is none.
        #[cfg(not(feature = "cuda"))]
        pub(crate) const IMAGES: &[(&str, &[u8])] = &[$(($file, &[]),)*];
    };
}

kernels! {
    "attention" {
        Attend16 "attend_16" "pppppppppppuuuuuf",
        Attend64 "attend_64" "pppppppppppuuuuuf",
        Attend128 "attend_128" "pppppppppppuuuuuf",
        Attend16One "attend_16_one" "pppppppppppuuuuuf",
        Attend64One "attend_64_one" "pppppppppppuuuuuf",
        Attend128One "attend_128_one" "pppppppppppuuuuuf",
        AttendCombine "attend_combine" "ppppuuu",
    }
    "cores" {
        CoreDown "core_down" "pppplluu",
        CoreUp "core_up" "ppppplluu",
        CloseGates "close_gates" "ppppplluuff",
        CoreDense "core_dense" "ppppplluu",
    }
    "draw" {
        Draw "draw" "pppppu",
    }
    "factor" {
        Symmetric "symmetric" "pppu",
        Widen "widen" "ppl",
        CopyBlock "copy_block" "ppuuull",
        ShiftDiagonal "shift_diagonal" "pud",
        FactorBlock "factor_block" "pppuuu",
        Eigen "eigen" "ppppuu",
        EmitLowRank "emit_low_rank" "pppppuuuulldu",
        EmitDense "emit_dense" "ppuull",
    }
    "norm" {
        RmsNorm "rms_norm" "pppuf",
        NormResidual "norm_residual" "pppuf",
        AddRmsNorm "add_rms_norm" "ppppuf",
        HeadNorm "head_norm" "ppuuuf",
    }
    "quant" {
        Dequantise4 "dequantise_4" "pppl",
        Dequantise8 "dequantise_8" "pppl",
        Multiply4 "multiply_4" "ppppuuu",
        Multiply4Wide "multiply_4_wide" "ppppuuu",
        Multiply8 "multiply_8" "ppppuuu",
        Multiply8Wide "multiply_8_wide" "ppppuuu",
    }
    "rows" {
        GatherRows "gather_rows" "pppuu",
        GatherResidual "gather_residual" "pppuu",
        SiluMul "silu_mul" "ppu",
        AddBias "add_bias" "ppu",
        AddScaled "add_scaled" "ppfl",
        AddScaledMasses "add_scaled_masses" "ppdu",
        AddMass "add_mass" "pppuuu",
        Narrow "narrow" "ppl",
        RopeAppend "rope_append" "ppppppppuuuu",
    }
}
