//! A way in, for kubectl: a port of the machine's loopback leads to the lab's kube-apiserver over a unix socket, which
//! crosses network namespaces. It leads nowhere else, and nothing of the lab can use it to get out.

use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::control_plane::{ADDRESS, ADMIN_TOKEN, API_PORT, kubeconfig};

/// The inner end: connections to the socket reach kube-apiserver.
///
/// # Errors
/// Fails when the socket cannot be made.
pub async fn serve_inside(socket: &Path) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    tokio::spawn(async move {
        while let Ok((mut outer, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut inner = TcpStream::connect((ADDRESS, API_PORT)).await?;
                copy_bidirectional(&mut outer, &mut inner).await
            });
        }
    });
    Ok(())
}

/// The outer end: a port of loopback leads to the socket. Writes `folder/kubeconfig` for it.
///
/// # Errors
/// Fails when no port can be had or the file cannot be written.
pub async fn serve_outside(folder: &Path, socket: PathBuf) -> anyhow::Result<PathBuf> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let path = folder.join("kubeconfig");
    let server = format!("https://{}", listener.local_addr()?);
    std::fs::write(&path, kubeconfig(&server, ADMIN_TOKEN))?;
    tokio::spawn(async move {
        while let Ok((mut outer, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut inner = UnixStream::connect(socket).await?;
                copy_bidirectional(&mut outer, &mut inner).await
            });
        }
    });
    Ok(path)
}
