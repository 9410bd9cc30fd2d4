//! Kernels against the reference, on every adapter of this machine.

use gqa::verify::{self, Gpu, Setup, Tolerance};

#[test]
fn random_problems() {
    let choice: verify::AdapterChoice = std::env::var("ADAPTER").unwrap_or("all".into()).parse().unwrap();
    let lo: u64 = std::env::var("LO").unwrap_or("0".into()).parse().unwrap();
    let hi: u64 = std::env::var("HI").unwrap_or("60".into()).parse().unwrap();
    for adapter in choice.pick(verify::adapters()) {
        let gpu = Gpu::open(&adapter).unwrap();
        eprintln!("{}\n{}", gpu.name(), gpu.caps);
        for family in [gqa::Family::Portable, gqa::Family::Auto] {
            for seed in lo..hi {
                let problem = verify::random_problem(seed);
                let setup = Setup { options: gqa::Options { family, ..Default::default() }, slack: 3 };
                let t = std::time::Instant::now();
                let a =
                    gqa::Attention::new(&gpu.device, problem.spec.clone(), setup.options.clone()).unwrap();
                let tc = t.elapsed();
                drop(a);
                let output = match verify::run(&gpu, &problem, &setup) {
                    Ok(o) => o,
                    Err(e) => {
                        eprintln!("{seed} {e}");
                        continue;
                    }
                };
                eprintln!(
                    "{seed} {family:?} compile {tc:?} all {:?} {}/{} {} {}",
                    t.elapsed(),
                    problem.spec.q_heads(),
                    problem.spec.kv_heads(),
                    problem.spec.head_dim(),
                    problem.spec.v_head_dim()
                );
                for (i, answer) in problem.answers().iter().enumerate() {
                    let m = verify::compare(
                        &output.out[i],
                        &answer.out,
                        Tolerance::of_output(&problem.spec, 6.0),
                    );
                    if !m.passes() {
                        eprintln!(
                            "{family:?} seed {seed} {:?} q {} kv {} {:?}: {m}",
                            problem.spec,
                            problem.sequences[i].q_len,
                            problem.sequences[i].kv_len,
                            problem.sequences[i].q_start
                        );
                    }
                    let m = verify::compare(&output.lse[i], &answer.lse, Tolerance::of_lse());
                    if !m.passes() {
                        eprintln!("{family:?} seed {seed} lse {:?}: {m}", problem.spec);
                    }
                }
            }
        }
    }
}
