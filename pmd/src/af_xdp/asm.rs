//! A small eBPF assembler: enough instructions for the steering program, jumps to named labels, and maps by descriptor.

use std::collections::HashMap;
use std::os::fd::RawFd;

/// One instruction as the kernel takes it (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Insn {
    pub(super) code: u8,
    /// Destination in the low four bits, source in the high ones.
    #[cfg(target_endian = "little")]
    pub(super) regs: u8,
    /// Source in the low four bits, destination in the high ones.
    #[cfg(target_endian = "big")]
    pub(super) regs: u8,
    pub(super) off: i16,
    pub(super) imm: i32,
}

/// A register. R0 is the result, R1 to R5 arguments that a call destroys, R6 to R9 stay, R10 is the frame pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R5 = 5,
    R6,
    R7,
    R8,
    R9,
    Fp,
}

/// Width of a load or store.
#[derive(Debug, Clone, Copy)]
pub(super) enum Width {
    B1,
    B2,
    B4,
}

/// Condition of a jump; comparisons are unsigned, 64 bits wide.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cond {
    Eq,
    Ne,
    Gt,
    Lt,
}

/// Why a program cannot be assembled: always a fault of the code that describes it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AsmError {
    #[error("label {0:?} is used and not placed, or placed twice")]
    Label(&'static str),
    #[error("a jump to {0:?} is too far")]
    TooFar(&'static str),
}

const LD_IMM64: u8 = 0x18;
const MEM_LOAD: u8 = 0x61;
const MEM_STORE: u8 = 0x63;
const MEM_STORE_IMM: u8 = 0x62;
const ALU64: u8 = 0x07;
const ALU_REG: u8 = 0x08;
const ADD: u8 = 0x00;
const AND: u8 = 0x50;
const LSH: u8 = 0x60;
const MOV: u8 = 0xb0;
const TO_BE: u8 = 0xdc;
const JMP: u8 = 0x05;
const JA: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
const PSEUDO_MAP_FD: u8 = 1;

/// A program being written.
#[derive(Debug, Default)]
pub(super) struct Asm {
    code: Vec<Insn>,
    labels: HashMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
    doubled: Option<&'static str>,
}

impl Asm {
    /// Places a label here.
    pub(super) fn label(&mut self, name: &'static str) {
        if self.labels.insert(name, self.code.len()).is_some() {
            self.doubled = Some(name);
        }
    }

    pub(super) fn mov(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | ALU_REG | MOV, dst, src as u8, 0, 0);
    }

    pub(super) fn mov_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | MOV, dst, 0, 0, imm);
    }

    pub(super) fn add(&mut self, dst: Reg, src: Reg) {
        self.push(ALU64 | ALU_REG | ADD, dst, src as u8, 0, 0);
    }

    pub(super) fn add_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | ADD, dst, 0, 0, imm);
    }

    pub(super) fn and_imm(&mut self, dst: Reg, imm: i32) {
        self.push(ALU64 | AND, dst, 0, 0, imm);
    }

    pub(super) fn shift_left(&mut self, dst: Reg, bits: i32) {
        self.push(ALU64 | LSH, dst, 0, 0, bits);
    }

    /// Swaps a 16-bit value between network and host order.
    pub(super) fn be16(&mut self, dst: Reg) {
        self.push(TO_BE, dst, 0, 0, 16);
    }

    /// `dst = *(width*)(base + off)`
    pub(super) fn load(&mut self, width: Width, dst: Reg, base: Reg, off: i16) {
        self.push(width.bits() | MEM_LOAD, dst, base as u8, off, 0);
    }

    /// `*(width*)(base + off) = src`
    pub(super) fn store(&mut self, width: Width, base: Reg, off: i16, src: Reg) {
        self.push(width.bits() | MEM_STORE, base, src as u8, off, 0);
    }

    /// `*(width*)(base + off) = imm`
    pub(super) fn store_imm(&mut self, width: Width, base: Reg, off: i16, imm: i32) {
        self.push(width.bits() | MEM_STORE_IMM, base, 0, off, imm);
    }

    /// `dst = the map behind the descriptor`
    pub(super) fn load_map(&mut self, dst: Reg, fd: RawFd) {
        self.push(LD_IMM64, dst, PSEUDO_MAP_FD, 0, fd);
        self.push(0, Reg::R0, 0, 0, 0);
    }

    pub(super) fn jump(&mut self, to: &'static str) {
        self.jumps.push((self.code.len(), to));
        self.push(JMP | JA, Reg::R0, 0, 0, 0);
    }

    pub(super) fn jump_if(&mut self, a: Reg, cond: Cond, b: Reg, to: &'static str) {
        self.jumps.push((self.code.len(), to));
        self.push(JMP | ALU_REG | cond.bits(), a, b as u8, 0, 0);
    }

    pub(super) fn jump_if_imm(&mut self, a: Reg, cond: Cond, imm: i32, to: &'static str) {
        self.jumps.push((self.code.len(), to));
        self.push(JMP | cond.bits(), a, 0, 0, imm);
    }

    pub(super) fn call(&mut self, helper: i32) {
        self.push(JMP | CALL, Reg::R0, 0, 0, helper);
    }

    pub(super) fn exit(&mut self) {
        self.push(JMP | EXIT, Reg::R0, 0, 0, 0);
    }

    /// The finished program.
    pub(super) fn finish(mut self) -> Result<Vec<Insn>, AsmError> {
        if let Some(name) = self.doubled {
            return Err(AsmError::Label(name));
        }
        for (at, name) in self.jumps {
            let to = *self.labels.get(name).ok_or(AsmError::Label(name))?;
            // Jumps count from the next instruction.
            let distance = i16::try_from(to)
                .ok()
                .zip(i16::try_from(at + 1).ok())
                .map(|(to, next)| to - next)
                .ok_or(AsmError::TooFar(name))?;
            if let Some(insn) = self.code.get_mut(at) {
                insn.off = distance;
            }
        }
        Ok(self.code)
    }

    fn push(&mut self, code: u8, dst: Reg, src: u8, off: i16, imm: i32) {
        let dst = dst as u8;
        let regs = if cfg!(target_endian = "little") {
            dst | src << 4
        } else {
            dst << 4 | src
        };
        self.code.push(Insn {
            code,
            regs,
            off,
            imm,
        });
    }
}

impl Width {
    fn bits(self) -> u8 {
        match self {
            Width::B4 => 0x00,
            Width::B2 => 0x08,
            Width::B1 => 0x10,
        }
    }
}

impl Cond {
    fn bits(self) -> u8 {
        match self {
            Cond::Eq => 0x10,
            Cond::Gt => 0x20,
            Cond::Ne => 0x50,
            Cond::Lt => 0xa0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_have_the_kernels_encoding() {
        let mut a = Asm::default();
        a.mov(Reg::R6, Reg::R1);
        a.load(Width::B2, Reg::R3, Reg::R7, 12);
        a.store(Width::B4, Reg::Fp, -8, Reg::R3);
        a.jump_if(Reg::R2, Cond::Gt, Reg::R8, "end");
        a.load_map(Reg::R1, 7);
        a.call(51);
        a.label("end");
        a.exit();
        let bytes: Vec<[u8; 8]> = a
            .finish()
            .unwrap()
            .iter()
            .map(|i| {
                let [a, b] = i.off.to_le_bytes();
                let [c, d, e, f] = i.imm.to_le_bytes();
                [i.code, i.regs, a, b, c, d, e, f]
            })
            .collect();
        // As disassembled by other tools: r6 = r1; r3 = *(u16 *)(r7 + 12); *(u32 *)(r10 - 8) = r3; if r2 > r8 goto +3; …
        assert_eq!(
            bytes,
            [
                [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
                [0x69, 0x73, 12, 0, 0, 0, 0, 0],
                [0x63, 0x3a, 0xf8, 0xff, 0, 0, 0, 0],
                [0x2d, 0x82, 3, 0, 0, 0, 0, 0],
                [0x18, 0x11, 0, 0, 7, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0],
                [0x85, 0, 0, 0, 51, 0, 0, 0],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    #[test]
    fn a_wrong_label_is_found() {
        let mut a = Asm::default();
        a.jump("nowhere");
        assert_eq!(a.finish(), Err(AsmError::Label("nowhere")));
        let mut a = Asm::default();
        a.label("x");
        a.label("x");
        assert_eq!(a.finish(), Err(AsmError::Label("x")));
    }
}
