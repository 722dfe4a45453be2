//! ModelService: what is served.
//!
//! Start at [`Service`].

use std::sync::Arc;

use imprint_proto::v1::{self, model_service_server::ModelService};
use tonic::{Request, Response, Status, async_trait};

use super::{Shared, count, strategy};
use crate::edge::tenant;

/// The service.
pub struct Service(pub Arc<Shared>);

impl Service {
    fn message(&self) -> v1::Model {
        let model = self.0.engine.model();
        let generator = model.generator.as_ref().map(|generator| v1::Generator {
            write: match generator.write {
                engine::Write::Published => "published",
                engine::Write::Associative => "associative",
            }
            .to_owned(),
            read_out: match generator.read_out {
                engine::ReadOut::Svd => "svd",
                engine::ReadOut::Frobenius => "frobenius",
                engine::ReadOut::Spectral => "spectral",
                engine::ReadOut::Ridge => "ridge",
            }
            .to_owned(),
            sites: generator
                .sites
                .iter()
                .map(|site| v1::Site {
                    layer: count(site.layer),
                    module: site.module.name().to_owned(),
                    r1: count(site.r1),
                    r2: count(site.r2),
                    rank: count(site.rank),
                })
                .collect(),
            window: count(generator.window),
            strategy: strategy(generator.strategy).into(),
            digest: generator.digest.clone(),
            parameters: generator.parameters as u64,
            prompt_format: generator.prompt_format.clone().unwrap_or_default(),
        });
        v1::Model {
            name: self.0.model.clone(),
            architecture: match model.architecture {
                engine::Architecture::Llama => "llama",
                engine::Architecture::Mistral => "mistral",
                engine::Architecture::Qwen2 => "qwen2",
                engine::Architecture::Qwen3 => "qwen3",
            }
            .to_owned(),
            parameters: model.parameters,
            layers: count(model.layers),
            hidden_size: count(model.hidden),
            vocab_size: count(model.vocab),
            context_length: count(model.context_length),
            weight_format: model.weight_format.clone(),
            digest: model.digest.clone(),
            generator,
        }
    }
}

#[async_trait]
impl ModelService for Service {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        tenant(&request)?;
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![self.message()],
        }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        tenant(&request)?;
        self.0.check_model(&request.get_ref().name)?;
        Ok(Response::new(v1::GetModelResponse {
            model: Some(self.message()),
        }))
    }
}
